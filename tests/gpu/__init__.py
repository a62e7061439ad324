"""What only a GPU can show. Every check skips, with its reason, where its hardware or packages are absent (docs/gpu.md)."""
