"""Cost models fitted to the live engine, and simulations compared with it."""
