"""One HTML page of runs or of a sweep, of what their folders hold: no server, no other file, nothing from a network."""
