package access

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestRateIsHeld(t *testing.T) {
	r, now := newRates(10, 20), time.Unix(1000, 0)
	for i := range 20 {
		if _, ok := r.take("a", now); !ok {
			t.Fatalf("request %d of the burst was refused", i)
		}
	}
	wait, ok := r.take("a", now)
	if ok || wait != 100*time.Millisecond {
		t.Errorf("after the burst: %v, wait %v, expected 100ms", ok, wait)
	}
	if _, ok := r.take("b", now); !ok {
		t.Error("one token's burst refused another's request")
	}
	if _, ok := r.take("a", now.Add(wait)); !ok {
		t.Error("refused after the wait that it named")
	}
	if _, ok := r.take("a", now.Add(-time.Hour)); ok {
		t.Error("a clock that went back gave a request away")
	}
	if _, ok := newRates(0, 0).take("a", now); !ok {
		t.Error("no limit refused")
	}
}

// TestRateOverAnySpan: whatever the arrivals, a span of d seconds passes at most burst + rate·d.
func TestRateOverAnySpan(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 1))
	const rate, burst = 7.0, 13.0
	r, at := newRates(rate, burst), time.Unix(0, 0)
	var passed []time.Time
	for range 2000 {
		at = at.Add(time.Duration(rng.Int64N(int64(200 * time.Millisecond))))
		if _, ok := r.take("a", at); ok {
			passed = append(passed, at)
		}
	}
	for i := range passed {
		for k := i; k < len(passed); k++ {
			// 1e-6 of a request: rounding of 2000 float64 additions below 20, each within 2^-49
			if most := burst + rate*passed[k].Sub(passed[i]).Seconds() + 1e-6; float64(k-i+1) > most {
				t.Fatalf("seed %d: %d requests in %v", seed, k-i+1, passed[k].Sub(passed[i]))
			}
		}
	}
	if len(passed) < 100 {
		t.Errorf("only %d passed", len(passed))
	}
}

func TestRatesAreBounded(t *testing.T) {
	r, now := newRates(1, 2), time.Unix(0, 0)
	for i := range maxBuckets + 10 {
		r.take(fmt.Sprint(i), now)
	}
	if len(r.buckets) > maxBuckets {
		t.Errorf("%d buckets", len(r.buckets))
	}
}

func TestAuditFollowsRotation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	a, err := OpenAudit(path)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	for i, do := range []func() error{
		func() error { return nil },
		func() error { return os.Rename(path, path+".1") },
		func() error { return os.Remove(path) },
	} {
		if err := do(); err != nil {
			t.Fatal(err)
		}
		if err := a.Write(Entry{Route: fmt.Sprintf("GET /%d", i)}); err != nil {
			t.Fatal(err)
		}
		raw, err := os.ReadFile(path)
		if err != nil || strings.Count(string(raw), "\n") != 1 || !strings.Contains(string(raw), fmt.Sprintf("GET /%d", i)) {
			t.Errorf("round %d: %q, %v", i, raw, err)
		}
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := LimitListener(inner, 2)
	accepted := make(chan net.Conn, 8)
	ended := make(chan error, 1)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				ended <- err
				return
			}
			accepted <- c
		}
	}()
	for range 3 {
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	first := <-accepted
	defer (<-accepted).Close()
	select {
	case <-accepted:
		t.Fatal("a third connection was accepted")
	case <-time.After(50 * time.Millisecond):
	}
	first.Close()
	first.Close() // gives one slot back, not two
	defer (<-accepted).Close()
	if l.Close(); <-ended == nil {
		t.Error("accepted after Close")
	}
}
