"""The store on a SQL database, whichever it is."""
