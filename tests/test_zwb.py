import time, warnings
from sae.config import *
from sae.mirror import open_mirror
def test_a(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m=open_mirror(TrainConfig(wandb=WandbConfig(project="tides",mode="offline")), tmp_path)
    for s in range(5): m.log({"layers.2.mlp_act/unusual_name":0.5,"nothing":None}, s)
    m.close()
    for i in range(15):
        l=[(p.stat().st_size, b"unusual_name" in p.read_bytes()) for p in tmp_path.glob("wandb/offline-run-*/*.wandb")]
        print(i*.2, l); time.sleep(.2)
