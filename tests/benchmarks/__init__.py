"""What `scripts/bench` measures: ours and the peer, or the limit, in turn in one run. No test asserts a time."""
