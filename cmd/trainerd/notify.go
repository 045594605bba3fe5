package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

// supervisor is systemd as a service of Type=notify sees it (sd_notify(3)). Its
// zero value, where there is none, does nothing.
type supervisor struct {
	socket   string        // NOTIFY_SOCKET; "@name" is an abstract one
	watchdog time.Duration // within which it wants to hear from us; 0: never
}

// supervised reads who supervises this process.
func supervised(getenv func(string) string) (supervisor, error) {
	s := supervisor{socket: getenv("NOTIFY_SOCKET")}
	raw := getenv("WATCHDOG_USEC")
	if raw == "" || s.socket == "" {
		return s, nil
	}
	if pid := getenv("WATCHDOG_PID"); pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return s, nil // meant for another process
	}
	usec, err := strconv.ParseInt(raw, 10, 64)
	if err != nil || usec <= 0 {
		return s, fmt.Errorf("read WATCHDOG_USEC: got %q, expected microseconds", raw)
	}
	s.watchdog = time.Duration(usec) * time.Microsecond
	return s, nil
}

// tell sends a state, such as "READY=1".
func (s supervisor) tell(state ...string) error {
	if s.socket == "" {
		return nil
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: s.socket, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	defer c.Close()
	if _, err := c.Write([]byte(strings.Join(state, "\n"))); err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	return nil
}

// keepalive tells the watchdog twice in its time that the server answers, until
// ctx ends. A server that does not answer is not spoken for, and is restarted.
func (s supervisor) keepalive(ctx context.Context, api http.Handler) {
	if s.watchdog <= 0 {
		return
	}
	tick := time.NewTicker(s.watchdog / 2)
	defer tick.Stop()
	for {
		if answers(ctx, api) {
			s.tell("WATCHDOG=1") // if it is lost, the next one may arrive
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// answers says whether the server answers /healthz, without a connection: none may be free.
func answers(ctx context.Context, api http.Handler) bool {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "/healthz", nil)
	if err != nil {
		return false
	}
	w := statusOnly{header: http.Header{}}
	api.ServeHTTP(&w, r)
	return w.status == http.StatusOK
}

// statusOnly is an http.ResponseWriter that keeps the status.
type statusOnly struct {
	header http.Header
	status int
}

func (w *statusOnly) Header() http.Header         { return w.header }
func (w *statusOnly) Write(p []byte) (int, error) { return len(p), nil }
func (w *statusOnly) WriteHeader(status int)      { w.status = status }
