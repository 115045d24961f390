"""What belongs to a namespace besides its sessions: keys, models, a quota."""
