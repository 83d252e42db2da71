"""Where a request may go, and what is known of who answers there."""
