"""A small data set of coloured boxes in TFDS's and in seqio's way; TFDS wants its builder in a package of its own."""
