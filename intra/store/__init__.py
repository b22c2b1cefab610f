"""The chunk store: token states and pooled vectors of every chunk, in shards; written, resumed, verified, read by chunk id."""
