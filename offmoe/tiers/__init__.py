"""Disk, RAM and device, and what moves bytes between them. Knows slots and copies, no policy and no router."""
