"""What differs between laptop, CI and cluster: the store, tracking, the launcher."""
