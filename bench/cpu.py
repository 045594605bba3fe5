#!/usr/bin/env python3
"""trainerd beside PyTorch on this machine's CPU: the same load, the same threads, in turn.

    cpu.py bin/trainerd [--rounds N] [--load cpu512] [--shape 135m]

Each round runs torch_baseline.py and `trainerd bench` one after the other; the ratio is
taken per round, so a drift of the machine's speed cancels. Every result is a JSON line.
"""
import argparse, json, os, pathlib, statistics, subprocess, sys, time

HERE = pathlib.Path(__file__).parent


def lines(cmd, env):
    out = subprocess.run([str(c) for c in cmd], check=True, env=env, stdout=subprocess.PIPE, text=True).stdout
    return [json.loads(l) for l in out.splitlines() if l.startswith("{")]


def torch_gemm(shapes, threads, repeats=50):
    import torch
    torch.set_num_threads(threads)
    best = {}
    for m, n, k in shapes:
        x, w = torch.randn(m, k), torch.randn(n, k)
        for _ in range(2):
            torch.nn.functional.linear(x, w)
        ts = []
        for _ in range(repeats):
            t = time.perf_counter()
            torch.nn.functional.linear(x, w)
            ts.append(time.perf_counter() - t)
        best[f"{m}x{k}x{n}"] = 2 * m * n * k / statistics.median(ts) / 1e9
    return best


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("trainerd")
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--repeats", type=int, default=2)
    ap.add_argument("--load", default="cpu512")
    ap.add_argument("--shape", default="135m")
    ap.add_argument("--threads", type=int, default=os.cpu_count())
    a = ap.parse_args()
    env = {**os.environ, "OMP_NUM_THREADS": str(a.threads), "GOMAXPROCS": str(a.threads)}

    shapes = [(1024, 1536, 576), (953, 3072, 576), (953, 576, 1536), (448, 49152, 576)]
    gemm = []
    for _ in range(a.rounds):
        theirs = torch_gemm(shapes, a.threads)
        ours = {r["shape"]: r["gflop_s"] for r in lines([a.trainerd, "bench", "gemm", "--workers", a.threads, "--repeats", 50], env)}
        gemm.append({s: (ours[s], theirs[s]) for s in theirs})
    for s in gemm[0]:
        o, t = (statistics.median(r[s][i] for r in gemm) for i in (0, 1))
        print(json.dumps({"name": "gemm", "shape": s, "trainerd_gflop_s": round(o, 1), "torch_gflop_s": round(t, 1),
                          "ratio": round(statistics.median(r[s][0] / r[s][1] for r in gemm), 3), "threads": a.threads}), flush=True)

    ratios = []
    for _ in range(a.rounds):
        theirs = [r for r in lines([sys.executable, HERE / "torch_baseline.py", "step", "--shape", a.shape, "--load", a.load, "--device", "cpu",
                                    "--modes", "eager", "--repeats", a.repeats], env) if r["name"] == "step"][0]
        ours = lines([a.trainerd, "bench", "step", "--shape", a.shape, "--load", a.load, "--device", "cpu", "--workers", a.threads, "--repeats", a.repeats], env)[0]
        print(json.dumps({"impl": "torch", **theirs}), flush=True)
        print(json.dumps(ours), flush=True)
        ratios.append(theirs["step_s"] / ours["step_s"])  # the same rollouts; torch_baseline.py rounds rollouts_s
    print(json.dumps({"name": "ratio", "shape": a.shape, "load": a.load, "threads": a.threads, "rounds": [round(r, 3) for r in ratios],
                      "median": round(statistics.median(ratios), 3)}), flush=True)


if __name__ == "__main__":
    main()
