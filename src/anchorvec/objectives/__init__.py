"""What trains an embedder: modules whose forward gives the loss of a batch."""
