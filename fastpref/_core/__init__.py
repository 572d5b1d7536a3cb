"""Code that the public functions share: argument checks, sequences, results, autograd and vocabulary shards."""
