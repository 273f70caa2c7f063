"""Models on the hub: lists of files, headers, downloads, the local cache. Knows HTTP and files, no model."""
