"""The proof: benchmarks that speak HTTP to us and to peers alike."""
