"""The pages and the summary that are made from what was measured."""
