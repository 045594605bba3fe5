package server_test

import (
	"bytes"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"trainerd/client"
	"trainerd/server/access"
	"trainerd/server/servertest"
)

// TestSecretsStayOut sends tokens where they belong and where they do not, and
// looks for them in everything that is written or answered.
func TestSecretsStayOut(t *testing.T) {
	g := guard(t, access.Options{}, servertest.Options{})
	admin := g.token(t, access.Grant{Roles: access.Roles})
	read := g.token(t, access.Grant{Roles: []access.Role{access.Read}})
	c, err := client.New(g.URL, client.Options{Token: admin})
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	j := create(t, c, ctx, g.JobDocument(2, nil))
	await(t, c, ctx, j.ID, "loaded", func(j client.Job) bool { return j.State != "loading" })
	if _, err := c.Submit(ctx, j.ID, servertest.Batch("g", 2, 2, -1, 1), "key"); err != nil {
		t.Fatal(err)
	}
	await(t, c, ctx, j.ID, "step 1 published", func(j client.Job) bool { return j.PolicyStep == 1 })
	var seen bytes.Buffer
	_, err = c.CreateJob(ctx, g.JobDocument(2, map[string]any{"model": map[string]any{"source": "s3://key:hunter2hunter2@bucket/x"}}), "")
	if client.Code(err) != "invalid_job" || !strings.Contains(err.Error(), "model.source") {
		t.Errorf("a source with a password: %v", err)
	}
	fmt.Fprintln(&seen, err)
	for _, r := range []struct {
		method, path string
		header       map[string]string
	}{
		{"GET", "/v1/jobs/" + j.ID, map[string]string{"Authorization": "Bearer " + read}},
		{"DELETE", "/v1/jobs/" + j.ID, map[string]string{"Authorization": "Bearer " + read}},
		{"GET", "/v1/jobs/" + j.ID, map[string]string{"Authorization": "Bearer " + read[:len(read)-1] + "g"}},
		{"GET", "/v1/jobs/" + j.ID, map[string]string{"Authorization": "Basic " + read}},
		{"GET", "/v1/jobs/" + j.ID, map[string]string{"Authorization": "Bearer " + read, "X-Request-Id": read}},
		{"GET", "/v1/jobs?access_token=" + read, nil},
		{"GET", "/metrics", map[string]string{"Authorization": "Bearer " + admin}},
		{"POST", "/v1/jobs", map[string]string{"Authorization": "Bearer " + admin, "Content-Type": "text/plain"}},
	} {
		req := httptest.NewRequest(r.method, r.path, nil)
		for k, v := range r.header {
			req.Header.Set(k, v)
		}
		w := httptest.NewRecorder()
		g.Handler.ServeHTTP(w, req)
		fmt.Fprintln(&seen, w.Code, w.Header(), w.Body)
	}
	job, err := c.Job(ctx, j.ID)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(&seen, string(job.Document))
	entries := g.entries(t)
	g.Stop()
	for _, path := range []string{g.audit, g.file, filepath.Join(g.DataDir, "trainerd.db")} {
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		seen.Write(raw)
	}
	if !strings.Contains(g.log.String(), `"msg":"request"`) {
		t.Error("the log has no requests, so it shows nothing")
	}
	seen.Write(g.log.Bytes())
	if bytes.Contains(seen.Bytes(), []byte("hunter2")) {
		t.Error("the password in a source was written or answered")
	}
	for _, text := range g.texts {
		secret := text[strings.LastIndex(text, "_")+1:]
		for _, part := range []string{secret, secret[:16], secret[24:40]} {
			if i := bytes.Index(seen.Bytes(), []byte(part)); i >= 0 {
				t.Errorf("a secret is in: %.200s", seen.Bytes()[max(0, i-100):])
			}
		}
	}
	// The log does say who did it, and what became of it.
	submitted := slices.ContainsFunc(entries, func(e access.Entry) bool {
		return e.Token == strings.Split(admin, "_")[1] && e.Route == "POST /v1/jobs/:job/rollouts" && e.Job == j.ID && e.Status == http.StatusAccepted && e.BytesIn > 0 && e.BytesOut > 0 && e.RequestID != ""
	})
	denied := slices.ContainsFunc(entries, func(e access.Entry) bool {
		return e.Token == strings.Split(read, "_")[1] && e.Route == "DELETE /v1/jobs/:job" && e.Status == http.StatusForbidden && e.Refused != ""
	})
	if !submitted || !denied {
		t.Errorf("entries: %+v", entries)
	}
}
