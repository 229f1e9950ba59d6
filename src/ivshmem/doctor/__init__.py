"""What sharing needs, checked one by one, on a host or inside a guest; and what fixes it."""
