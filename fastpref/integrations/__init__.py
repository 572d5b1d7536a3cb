"""Use fastpref inside training libraries. A library is imported when a function of its integration needs it."""
