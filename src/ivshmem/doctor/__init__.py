"""Internal: checks one by one what sharing needs, on a host or in a guest; says what fixes it."""
