"""What each figure in the docs was measured with."""
