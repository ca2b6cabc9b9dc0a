"""Real exporters on tiny real architectures: recipes, exports, and tests that run them."""
