"""Sessions as the event loop knows them: found, checked, accounted for."""
