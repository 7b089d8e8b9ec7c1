"""`launch_tpu.sh`: asks the cloud for TPUs, sets hosts up, keeps a run going on them. The standard library
alone, Python 3.10 and later: what TPU VMs have before anything is installed."""
