"""Internal: what one participant is: an endpoint, a client, names in a region."""
