"""Tests of vhost_user.attack: our back end passes, and daemons that are broken on purpose do not."""
