"""One merge by many processes on many machines, which share nothing but a file system. Schedules nothing itself."""
