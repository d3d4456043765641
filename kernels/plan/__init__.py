"""Plans made on the host once for each step: which rows attend to what, and which adapter they use."""
