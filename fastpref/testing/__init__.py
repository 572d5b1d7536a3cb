"""The accuracy rule, the cases and the examples that the tests, the benchmarks and `fastpref check` share.

`import fastpref` does not import this package.
"""
