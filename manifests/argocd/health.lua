-- Argo CD's health of an InferenceService, from its Ready condition. Lua 5.1 without libraries, as Argo CD runs it.
-- docs/gitops.md says how Argo CD gets it; tests/operator/test_argocd.py runs it over a service's whole life.

if obj.metadata.deletionTimestamp ~= nil then
  return {status = "Progressing", message = "being deleted"}
end

-- What was said of an older spec is no answer for this one.
local current = obj.metadata.generation
if obj.status == nil or obj.status.conditions == nil or obj.status.observedGeneration ~= current then
  return {status = "Progressing", message = "the operator has not seen this spec yet"}
end

for _, condition in ipairs(obj.status.conditions) do
  if condition.type == "Ready" then
    local message = condition.reason .. ": " .. condition.message
    if condition.status == "True" then
      return {status = "Healthy", message = message}
    elseif condition.reason == "Suspended" then
      return {status = "Suspended", message = message}
    elseif condition.status == "False" then
      return {status = "Degraded", message = message}
    end
    return {status = "Progressing", message = message}
  end
end

return {status = "Progressing", message = "the operator has not told yet whether it is ready"}
