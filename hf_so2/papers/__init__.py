"""The claims of the papers that the methods come from, put to the test on small networks: `hf-so2 papers`."""
