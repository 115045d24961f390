"""What is on the device: pages, chunks, which of them are resident, and how they come."""
