//go:build cuda && !cudaemu

package cuda

import (
	"flag"
	"strings"
	"testing"

	"trainerd/kernels"
	"trainerd/kernels/hostmem"
	"trainerd/kernels/kerneltest"
)

var cardFlag = flag.Int("cuda.card", 0, "number of the card to test")

// open takes the card. There is no skipping: this suite is run where a GPU is.
func open(t *testing.T) *Device {
	t.Helper()
	d, err := Open(*cardFlag, Options{})
	if err != nil {
		t.Fatalf("this suite needs a GPU: %v", err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d
}

func TestDevice(t *testing.T) { kerneltest.Run(t, open(t)) }

// TestDeviceWgmma: attention by products of warpgroups, or a refusal that says why not.
func TestDeviceWgmma(t *testing.T) {
	d, err := Open(*cardFlag, Options{Attention: AttentionWgmma})
	if err != nil {
		if ours := open(t).q; !strings.Contains(err.Error(), "compute capability 9.0") || hasWgmma(ours) {
			t.Fatal(err)
		}
		t.Logf("not on this card: %v", err)
		return
	}
	t.Cleanup(func() { _ = d.Close() })
	kerneltest.Run(t, d, "attention", "decode")
	testModels(t, d)
}

func hasWgmma(q *queue) (has bool) {
	_ = q.call(command{label: of("memory", ""), run: func(c driver) error {
		has = c.has("attention_forward_64_wgmma")
		return nil
	}})
	return has
}

func TestModels(t *testing.T) { testModels(t, open(t)) }

func TestMaster(t *testing.T) { testMaster(t, open(t)) }

func TestStaging(t *testing.T) { testStaging(t, open(t)) }

func TestMemory(t *testing.T) { testMemory(t, open(t)) }

func TestPins(t *testing.T) {
	testPins(t, open(t))
	testPinsEnd(t, open(t))
}

func TestProfiledStep(t *testing.T) { testProfile(t, open(t)) }

// TestReopen: an illegal address loses the context, says so, and a new device works.
func TestReopen(t *testing.T) {
	d := open(t)
	bad := &buffer{t: kernels.BF16, n: 64, at: 1 << 46}
	index, err := d.Alloc("test", kernels.I32, 1)
	if err != nil {
		t.Fatal(err)
	}
	memory := pinnable(t, hostmem.Large)
	unpin, err := d.Pin(memory)
	if err != nil {
		t.Fatal(err)
	}
	d.Zero(index)
	d.Gather(bad, bad, index, 64)
	if err := d.Sync(); err == nil || !strings.Contains(err.Error(), "cuda: ") {
		t.Fatalf("after an illegal address Sync gives %v", err)
	}
	if err := d.Sync(); err == nil {
		t.Error("a lost device works again")
	}
	unpin() // memory that was pinned on it is the host's again, and may be freed
	e, err := Open(*cardFlag, Options{})
	if err == nil {
		t.Run("reopened", func(t *testing.T) { testMaster(t, e) }) // of its own: its buffers are freed before the device
		if err := e.Close(); err != nil {
			t.Error(err)
		}
		return
	}
	t.Logf("beside the lost context: %v", err)
	if err := d.Close(); err != nil {
		t.Logf("close the lost device: %v", err)
	}
	testMaster(t, open(t))
}

// TestCardNumber: a card that is not there is named with those that are.
func TestCardNumber(t *testing.T) {
	open(t)
	if _, err := Open(77, Options{}); err == nil || !strings.Contains(err.Error(), "cuda:77") {
		t.Errorf("cuda:77 gives %v", err)
	}
}

// TestTooMuch: an allocation that cannot be is refused with the bytes, and nothing is broken.
func TestTooMuch(t *testing.T) {
	d := open(t)
	if _, err := d.Alloc("weights", kernels.F32, 1<<40); err == nil || !strings.Contains(err.Error(), "wanted") {
		t.Fatalf("4 TiB give %v", err)
	}
	testMaster(t, d)
}
