"""vhost-user and the guest memory that it shares: both roles, rings and memory."""
