"""The guest's side: ways out to the backend."""
