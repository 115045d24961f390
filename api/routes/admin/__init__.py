"""What admins ask for: keys, quotas, models, metrics."""
