"""fastpref inside the libraries people train with. What imports one of them itself is imported when asked for."""
