"""What is trained on: edges are split and encoded, negatives are sampled, held-out edges are set aside."""
