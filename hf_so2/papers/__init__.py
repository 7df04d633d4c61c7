"""The claims of the papers that the methods come from, put to the test on small networks: `scripts/papers.py`."""
