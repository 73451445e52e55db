"""What a model can do, measured through the engine's `score` alone, so that any engine and layout can be measured."""
