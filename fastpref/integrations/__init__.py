"""fastpref inside the libraries people train with. Nothing here imports one of them."""
