package red

import (
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"trainerd/secloop/scenario"
)

// lateConn notices the end of every read late, as on a machine with too much to do.
type lateConn struct {
	net.Conn
	late time.Duration
}

func (c lateConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if os.IsTimeout(err) {
		time.Sleep(c.late)
	}
	return n, err
}

// TestPull: whoever sends enough is waited for, whoever sends too little is not,
// and patience stretches when its ticks do.
func TestPull(t *testing.T) {
	const least, total = 24 << 10, 64 << 10
	text := strings.Repeat("x", total)
	patience := scenario.Patience * scenario.PatienceTick
	for _, c := range []struct {
		name   string
		send   func(c net.Conn)
		late   time.Duration
		count  int
		gaveUp bool
		within time.Duration // at least
	}{
		{"all at once", func(c net.Conn) { c.Write([]byte(text)) }, 0, total, false, 0},
		{"all in small pieces", func(c net.Conn) {
			for range total / 64 {
				c.Write([]byte(text[:64]))
			}
		}, 0, total, false, 0},
		{"twice as much as is taken", func(c net.Conn) { c.Write([]byte(text + text + text + text)) }, 0, maxBytes, false, 0},
		{"too little, then the end", func(c net.Conn) { c.Write([]byte(text[:100])) }, 0, 100, false, 0},
		{"too little, then nothing", func(c net.Conn) { c.Write([]byte(text[:least-1])); readUntilClosed(c) }, 0, least - 1, true, patience},
		{"enough once, then nothing", func(c net.Conn) { c.Write([]byte(text[:least])); readUntilClosed(c) }, 0, least, true, patience},
		{"nothing", readUntilClosed, 0, 0, true, patience},
		{"late, on a busy machine", func(c net.Conn) { time.Sleep(patience + patience/5); c.Write([]byte(text)) }, scenario.PatienceTick, total, false, patience},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			near, far := net.Pipe()
			done := make(chan struct{})
			go func() {
				defer close(done)
				defer far.Close()
				if line, err := readLine(far); line != "bulk" || err != nil {
					t.Errorf("sender read %q, %v", line, err)
				}
				c.send(far)
			}()
			start := time.Now()
			got, err := pull(lateConn{near, c.late}, "bulk\n", least)
			if (err != nil) != c.gaveUp || len(got) != c.count {
				t.Errorf("%d bytes, %v; expected %d, given up: %v", len(got), err, c.count, c.gaveUp)
			}
			if d := time.Since(start); d < c.within {
				t.Errorf("over after %s, expected to wait %s", d, c.within)
			}
			<-done
		})
	}
}

// readUntilClosed is a sender who does not send.
func readUntilClosed(c net.Conn) { readLine(c) }
