//go:build faults

package faulttest

import (
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"trainerd/model"
	"trainerd/server/servertest"
)

// recovery is the time within which everything must be well again once a fault
// has ended: the longest pause between two tries of a publication, and some.
const recovery = 60 * time.Second

// s3Flags point a server at a store behind an address.
func s3Flags(url string) []string {
	return []string{"--store", "s3://" + bucket + "/" + prefix, "--s3-endpoint", url, "--s3-timeout", "3s"}
}

// wideConfig is a model whose weights are several parts of a multipart upload.
func wideConfig() model.Config {
	c := servertest.TinyConfig()
	c.Vocab, c.Hidden, c.FFN, c.Layers, c.HeadDim = 4608, 1024, 64, 1, 16
	c.InitStd = 0.02
	return c
}

func TestStoreKilledMidUpload(t *testing.T) {
	t.Parallel()
	m := startMinIO(t, t.TempDir())
	p := startProxy(t, m.addr, 1)
	w := newWorld(t, options{store: s3Flags(p.url), keys: rightKeys, model: wideConfig(), pace: 700 * time.Millisecond,
		document: func(doc map[string]any) {
			doc["optimizer"] = map[string]any{"lr": 1e-4}
			doc["checkpoint"].(map[string]any)["publish_every_steps"] = every / 2
		}})
	w.healthy()

	from := w.mark()
	var struck atomic.Bool
	hit := make(chan struct{})
	p.set(mode{halfway: func(r *http.Request) {
		if r.Method == http.MethodPut && r.URL.Query().Get("partNumber") == "2" && struck.CompareAndSwap(false, true) {
			m.kill()
			close(hit)
		}
	}})
	select {
	case <-hit:
	case <-time.After(time.Minute):
		t.Fatal("no second part was uploaded")
	}
	w.says("publish_failed", "", from.at, 30*time.Second)
	w.goesOn(from, 30*time.Second)
	m.start(rightKeys)
	w.recovers(recovery, "publish_failed")
	w.finishStore(m)
}

func TestStorePaused(t *testing.T) {
	t.Parallel()
	m := startMinIO(t, t.TempDir())
	w := newWorld(t, options{store: s3Flags("http://" + m.addr), keys: rightKeys})
	w.healthy()
	from := w.mark()
	m.pause()
	w.says("publish_failed", "", from.at, 3*time.Minute)
	w.goesOn(from, 30*time.Second)
	m.resume()
	w.recovers(recovery, "publish_failed")
	w.finishStore(m)
}

func TestStoreOutOfSpace(t *testing.T) {
	t.Parallel()
	dir := smallDisk(t, 64)
	m := startMinIO(t, dir+"/data")
	w := newWorld(t, options{store: s3Flags("http://" + m.addr), keys: rightKeys})
	w.healthy()
	from := w.mark()
	free := fillDisk(t, dir)
	w.says("publish_failed", "", from.at, time.Minute)
	w.goesOn(from, 30*time.Second)
	free()
	w.recovers(recovery, "publish_failed")
	w.finishStore(m)
}

func TestStoreRefusesTheCredentials(t *testing.T) {
	t.Parallel()
	m := startMinIO(t, t.TempDir())
	wrong := keys{rightKeys.access, "faulttest-wrong-77aa"}
	_, err := serve(options{data: t.TempDir(), store: s3Flags("http://" + m.addr), keys: wrong})
	if err == nil {
		t.Fatal("a server with wrong credentials started")
	}
	for _, part := range []string{"access denied", bucket, m.addr} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("the refusal does not name %q: %v", part, err)
		}
	}
	if strings.Contains(err.Error(), wrong.secret) {
		t.Errorf("the refusal holds the secret: %v", err)
	}

	w := newWorld(t, options{store: s3Flags("http://" + m.addr), keys: rightKeys})
	w.healthy()
	from := w.mark()
	m.kill()
	m.start(keys{rightKeys.access, "faulttest-rotated-cc02"})
	w.says("publish_failed", "access denied", from.at, time.Minute)
	w.goesOn(from, 30*time.Second)
	if strings.Contains(w.server.log.String(), rightKeys.secret) {
		t.Error("the log holds the secret")
	}
	m.kill()
	m.start(rightKeys)
	w.recovers(recovery, "publish_failed")
	w.finishStore(m)
}

// TestStoreIsFlaky trains through a store that fails one request in four, in every way there is.
func TestStoreIsFlaky(t *testing.T) {
	t.Parallel()
	m := startMinIO(t, t.TempDir())
	p := startProxy(t, m.addr, 5)
	w := newWorld(t, options{store: s3Flags(p.url), keys: rightKeys})
	w.healthy()
	p.set(mode{slowDown: 0.05, broken: 0.05, cutUp: 0.05, lost: 0.05, truncated: 0.05})
	at := w.status().PolicyStep
	w.await("ten publications all the same", 2*time.Minute, func() bool { return w.status().PolicyStep >= at+10*every })
	p.set(mode{})
	t.Logf("injected: %v", p.injected())
	for _, kind := range []string{"slowDown", "broken", "cutUp", "lost", "truncated"} {
		if p.injected()[kind] == 0 {
			t.Errorf("no request met the fault %s", kind)
		}
	}
	w.recovers(recovery)
	w.finishStore(m)
}

// TestStoreAnswersOnly503 is a store that refuses everything for a while.
func TestStoreAnswersOnly503(t *testing.T) {
	t.Parallel()
	m := startMinIO(t, t.TempDir())
	p := startProxy(t, m.addr, 6)
	w := newWorld(t, options{store: s3Flags(p.url), keys: rightKeys})
	w.healthy()
	from := w.mark()
	p.set(mode{slowDown: 1})
	w.says("publish_failed", "SlowDown", from.at, time.Minute)
	w.goesOn(from, 30*time.Second)
	p.set(mode{})
	w.recovers(recovery, "publish_failed")
	w.finishStore(m)
}

// TestStoreIsSlow publishes through 200 kB/s and half a second before each answer:
// nothing fails, the newest step is published late.
func TestStoreIsSlow(t *testing.T) {
	t.Parallel()
	m := startMinIO(t, t.TempDir())
	p := startProxy(t, m.addr, 7)
	w := newWorld(t, options{store: s3Flags(p.url), keys: rightKeys})
	w.healthy()
	p.set(mode{rate: 200 << 10, delay: 500 * time.Millisecond})
	from := w.mark()
	w.goesOn(from, 30*time.Second)
	at := w.status().PolicyStep
	w.await("two more publications, slowly", 2*time.Minute, func() bool { return w.status().PolicyStep >= at+2*every })
	if e := w.status().LastError; e != nil && e.Time.After(from.at) {
		t.Errorf("a slow store is an error: %+v", e)
	}
	p.set(mode{})
	w.recovers(recovery)
	w.finishStore(m)
}
