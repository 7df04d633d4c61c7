"""Code that several curvature blocks share: forms of factors, ways to split a block, costs and spectra."""
