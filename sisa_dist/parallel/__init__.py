"""How a model is laid over processes. Today: the mesh and its data axis."""
