"""What a router is, geometrically: the parts of the analysis `router`."""
