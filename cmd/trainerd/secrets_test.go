package main

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"trainerd/client"
	"trainerd/server/access"
)

// TestSecretsOfARun gives a server secrets in every way there is, makes it use
// them and fail with them, and looks for them in all that it wrote and answered.
func TestSecretsOfARun(t *testing.T) {
	const s3Secret, inURL, forTraces = "s3-secret-0123456789", "hunter2hunter2", "trace-password-987"
	dir := t.TempDir()
	data := filepath.Join(dir, "data")
	_, token, err := access.CreateToken(filepath.Join(data, "tokens.json"), access.Grant{Roles: access.Roles})
	if err != nil {
		t.Fatal(err)
	}
	traces := newReceiver(t)
	store := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { // refuses everything, and says what it was sent
		w.WriteHeader(http.StatusForbidden)
		fmt.Fprintf(w, "<Error><Code>SignatureDoesNotMatch</Code><Message>%s</Message></Error>", r.Header.Get("Authorization"))
	}))
	defer store.Close()
	source := tinyModel(t)
	p := spawn(t, data, []string{"TRAINERD_S3_SECRET_KEY=" + s3Secret, "TRAINERD_S3_ACCESS_KEY=AKIDEXAMPLE", "TRAINERD_S3_ENDPOINT=" + store.URL,
		"OTEL_EXPORTER_OTLP_HEADERS=authorization=Bearer " + forTraces},
		"--trace-endpoint", traces.URL, "--model-root", source, "--model-bucket", "bucket", "--drain", "0s")
	var seen bytes.Buffer
	c, err := client.New(p.URL, client.Options{Token: token, Retries: -1})
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	doc := func(source string) map[string]any {
		return map[string]any{"model": map[string]any{"source": source}, "objective": map[string]any{"group_size": 2}, "batch": map[string]any{"groups_per_step": 1, "max_tokens_per_micro_batch": 256},
			"sampling": map[string]any{"max_sequences": 0, "max_tokens": 0}}
	}
	j, err := c.CreateJob(ctx, doc("dir:"+source), "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Submit(ctx, j.ID, pairs("g", 1), ""); err != nil {
		t.Log(err) // it may not be loaded yet
	}
	if j, err = c.Wait(ctx, j.ID, 5*time.Millisecond, func(j client.Job) bool { return j.PolicyStep >= 0 || j.Final() }); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(&seen, "%+v %s\n", j, j.Document)
	// A source in a bucket that refuses, and sources with passwords in them.
	for _, s := range []string{"s3://bucket/model", "s3://key:" + inURL + "@bucket/model", "http://me:" + inURL + "@example.org/model", "dir:/nowhere?password=" + inURL} {
		created, err := c.CreateJob(ctx, doc(s), "")
		if err == nil { // it pulls in the background, and says in its status what is wrong
			if created, err = c.Wait(ctx, created.ID, 5*time.Millisecond, func(j client.Job) bool { return j.LastError != nil || j.Final() }); err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(&seen, "%+v\n", created.LastError)
			continue
		}
		if !strings.Contains(s, inURL) { // a refusal may say what was sent to those who sent it, but the log below may not
			fmt.Fprintln(&seen, err)
		}
	}
	for _, path := range []string{"/metrics", "/v1/jobs", "/v1/jobs/" + j.ID, "/v1/jobs/" + j.ID + "/steps", "/v1/nowhere?token=" + token} {
		for _, auth := range []string{"Bearer " + token, "Basic " + token, ""} {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.URL+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			if auth != "" {
				req.Header.Set("Authorization", auth)
			}
			res, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			raw, _ := io.ReadAll(res.Body)
			res.Body.Close()
			fmt.Fprintln(&seen, res.Status, res.Header, string(raw))
		}
	}
	p.signal(t)
	if status, sig := p.wait(t, 65*time.Second); status != 0 {
		t.Fatalf("exit status %d, signal %v\n%s", status, sig, p.text())
	}
	fmt.Fprintln(&seen, p.text())
	if !strings.Contains(p.text(), "AKID") && !strings.Contains(p.text(), "[redacted]") {
		t.Error("the log does not show the configuration, so it shows nothing")
	}
	files := 0
	err = filepath.WalkDir(data, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		raw, err := os.ReadFile(path)
		seen.Write(raw)
		files++
		return err
	})
	if err != nil || files < 4 {
		t.Fatalf("%d files, %v", files, err)
	}
	traces.mu.Lock()
	defer traces.mu.Unlock()
	if traces.raw.Len() == 0 {
		t.Error("no spans came")
	}
	seen.Write(traces.raw.Bytes())
	secret := token[strings.LastIndex(token, "_")+1:]
	for name, text := range map[string]string{"token": secret, "half of the token": secret[:len(secret)/2], "S3 secret": s3Secret, "password in an address": inURL, "collector's password": forTraces} {
		if i := bytes.Index(seen.Bytes(), []byte(text)); i >= 0 {
			t.Errorf("the %s is in: %.300q", name, seen.Bytes()[max(0, i-150):])
		}
	}
}

// TestPasswordsInAddressesAreRefused: settings that are shown in the log may not
// hold a password, and the refusal does not show it either.
func TestPasswordsInAddressesAreRefused(t *testing.T) {
	for _, flags := range [][]string{
		{"--s3-endpoint", "http://key:hunter2@127.0.0.1:9000"},
		{"--store", "s3://key:hunter2@bucket/x", "--s3-endpoint", "127.0.0.1:9000"},
		{"--trace-endpoint", "http://me:hunter2@127.0.0.1:4318"},
	} {
		out, log, err := command(t, append([]string{"serve", "--device", "cpu", "--listen", "127.0.0.1:0", "--data", t.TempDir()}, flags...)...)
		if err == nil {
			t.Errorf("%q: accepted", flags)
		}
		if text := fmt.Sprint(out, log, err); strings.Contains(text, "hunter2") {
			t.Errorf("%q: %s", flags, text)
		}
	}
}
