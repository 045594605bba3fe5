package client

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The handshakes themselves are tested where the server is: cmd/trainerd.
func TestTLSFilesRefused(t *testing.T) {
	text := filepath.Join(t.TempDir(), "text.pem")
	if err := os.WriteFile(text, []byte("no PEM"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		o    Options
		want string
	}{
		"no such authority":     {Options{TLS: TLS{CA: text + "x"}}, "authorities"},
		"authority without PEM": {Options{TLS: TLS{CA: text}}, "text.pem"},
		"certificate alone":     {Options{TLS: TLS{Cert: text}}, "both"},
		"key alone":             {Options{TLS: TLS{Key: text}}, "both"},
		"certificate no PEM":    {Options{TLS: TLS{Cert: text, Key: text}}, "client certificate"},
		"beside a client":       {Options{TLS: TLS{CA: text}, HTTP: &http.Client{}}, "HTTP"},
	} {
		if _, err := New("https://127.0.0.1:1", tc.o); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, expected to name %q", name, err, tc.want)
		}
	}
}
