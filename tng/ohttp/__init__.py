"""OHTTP as TNG speaks it: requests encapsulated one by one, through any HTTP load balancer."""
