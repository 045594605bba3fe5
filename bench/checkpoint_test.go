package bench

import (
	"bytes"
	"strings"
	"testing"

	"trainerd/kernels/cpu"
	"trainerd/storage/disk"
)

// TestCheckpoint runs the benchmark on the smallest shape and holds its bytes to arithmetic.
func TestCheckpoint(t *testing.T) {
	dev, err := cpu.New(1)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	cfg, err := Shape("smoke")
	if err != nil {
		t.Fatal(err)
	}
	n := cfg.Parameters()
	for _, tc := range []struct {
		snapshot    bool
		host, store int64 // bytes for each parameter; padding and headers come on top
	}{{false, 2, 2}, {true, 4 + 8, 2 + 4 + 8}} {
		store, err := disk.Open(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer store.Close()
		r, err := Checkpoint(t.Context(), dev, CheckpointOptions{Shape: "smoke", Load: "smoke", DType: "BF16", Snapshot: tc.snapshot, Repeats: 2, MaxTokens: 128, Store: store})
		if err != nil {
			t.Fatal(err)
		}
		if over := r.HostBytes - tc.host*n; over < 0 || over > 16<<10 {
			t.Errorf("%d bytes captured of %d parameters", r.HostBytes, n)
		}
		if over := r.Bytes - tc.store*n; over < 0 || over > 16<<10 {
			t.Errorf("%d bytes stored of %d parameters", r.Bytes, n)
		}
		if r.CaptureSeconds <= 0 || r.WriteSeconds <= 0 || r.DirectSeconds <= 0 || r.StepSeconds <= 0 || r.CaptureCPU < 0 || r.WriteCPU <= 0 || r.StepCPU <= 0 || r.FirstSeconds <= 0 || r.BesideSeconds <= 0 {
			t.Errorf("times %+v", r)
		}
		var out bytes.Buffer
		if err := r.Table(&out); err != nil || !strings.Contains(out.String(), "cost, published every 10") {
			t.Errorf("%s, %v", out.String(), err)
		}
	}
}
