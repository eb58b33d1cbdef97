{{- define "ztun.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "ztun.labels" -}}
app.kubernetes.io/name: {{ . }}
app.kubernetes.io/part-of: istio
{{- end }}

{{- /* Where the pods of both DaemonSets run. */}}
{{- define "ztun.scheduling" -}}
priorityClassName: {{ .Values.priorityClassName }}
nodeSelector: {{- toYaml .Values.nodeSelector | nindent 2 }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
tolerations: {{- toYaml .Values.tolerations | nindent 2 }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{- define "ztun.env" -}}
{{- range $name, $value := . }}
- name: {{ $name | quote }}
  value: {{ $value | toString | quote }}
{{- end }}
{{- end }}
