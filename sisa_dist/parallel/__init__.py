"""How a model is laid over processes: the mesh, the plan of splits, what carries it out, and the view on storage."""
